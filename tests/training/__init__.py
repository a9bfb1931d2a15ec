"""Tests of `training`: scenes, prompts, the training code, and the shipped model."""
