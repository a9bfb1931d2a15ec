"""What the commands print: lines, tables, progress bars and pictures."""
