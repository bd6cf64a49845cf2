"""Checkpoints: weights, optimizer and generators in folders that are whole or not there, written beside
training.

``record`` names, lists, verifies and prunes them (no torch); ``state`` names the tensors, ``files`` stores
them, ``staging`` copies them to host memory, ``writer`` puts it all together on a thread, ``resume`` finds
and loads one, ``assemble`` makes a model directory of one.
"""
