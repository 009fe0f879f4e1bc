"""When to learn. What to learn is mathematics and lives in `adapters`."""
