"""HTTP: metrics and probes. The OpenAI surface is not built yet."""
