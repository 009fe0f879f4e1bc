"""The paged KV cache: who owns which page (`pages`), and the arrays behind them (`pool`)."""
