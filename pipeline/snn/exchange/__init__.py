"""Networks in formats that others read."""
