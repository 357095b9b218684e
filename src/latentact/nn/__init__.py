"""Networks: pure modules without losses or settings."""
