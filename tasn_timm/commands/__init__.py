"""The commands of `python -m tasn_timm`, one file each.

A command has a docstring, which --help shows, SUMMARY (a line), EXAMPLES, where needed USAGE, and two functions:
add_arguments(parser) and run(options).
"""
