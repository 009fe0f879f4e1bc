"""BLAS on one thread: what is multiplied here is small, and waking a second thread is not.

Beside a busy engine, a product of 4 x 896 by 896 x 160 takes 0.1 ms on one thread and up to 30 ms
on two, because the second one has to get a core first. XLA has threads of its own; they stay.
"""

from threadpoolctl import threadpool_limits


def use_one_blas_thread() -> None:
    """Hold for the whole process. Call it once, at start-up."""
    threadpool_limits(limits=1, user_api="blas")
