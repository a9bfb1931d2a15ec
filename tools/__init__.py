"""What builds files that are checked in."""
