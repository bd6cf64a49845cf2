"""What the sub-commands of ``cod`` do, apart from reading flags: each module is imported when its command
runs.
"""
