"""For all tests: how they are run shall not decide what they find."""

import signal

from hypothesis import HealthCheck, settings

# A machine that is busy is no reason for hypothesis to fail a test.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")

# A shell starts what runs in the background with interrupts ignored, and so would the programs that
# the tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
