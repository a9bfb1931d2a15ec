"""How long jobs take: batch times, remaining work, simulation, calibration."""
