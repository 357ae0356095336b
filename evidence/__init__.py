"""What measures the method and draws what it finds; no part of it."""
