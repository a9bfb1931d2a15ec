"""What every door offers: one use case each, from a plain request to a job. Knows no protocol."""
