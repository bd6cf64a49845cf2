"""Policy versions on disk: what a version is called, how it is published, and how it is loaded and
verified.
"""
