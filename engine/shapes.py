"""The dimension key. Array annotations and suffixes everywhere use these letters.

B sequences in the batch      T new tokens per sequence     S cached tokens
N query heads                 K key/value heads             G = N / K
H head dimension              D model dimension             F MLP dimension
V vocabulary                  L layers                      R rank of a head slot
P pages in the pool           M pages per sequence          C tokens per page
A head slots on the device    J vocabulary rows of a slot   E token keys of a slot
Q captured base logits (64)
"""
