"""What the machine has and does: memory, cgroup limits, GPU sensors, timers."""
