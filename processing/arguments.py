"""Kinds of values for the command lines."""

import argparse


def positive(text: str) -> int:
    """A number from 1 on, for argparse."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number from 1 on")
    return int(text)
