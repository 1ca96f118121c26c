"""What supports the scripts, a module for each subject.

This file makes `kit` a package of its own: without it a kit.py anywhere on the path would come
first.
"""
