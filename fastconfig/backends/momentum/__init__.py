"""M-ConFIG's step, once a backend: ``Segment``, as ``reference`` defines it."""
