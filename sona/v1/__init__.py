"""Generated from protos/sona/v1 by tools/gen_protos.py. Do not edit."""
