"""The command safeclip."""
