"""One folder per operation, one public function each; `reference` is XLA and always there."""
