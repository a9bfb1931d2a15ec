"""Tests of `training`: the drawn world, its words, and what the shipped model reached."""
