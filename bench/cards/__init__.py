"""Which models fit which card: bytes counted on the meta device."""
