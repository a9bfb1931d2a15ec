"""Tiny models for tests of tasks, ControlNets and pipelines that no family describes."""
