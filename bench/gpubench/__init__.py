"""The parts of ``bench/gpu.py``, imported one way: ``shapes`` → ``results`` → ``timing`` → ``inputs`` → ``speed``,
``overhead``, ``launch_table`` → ``sections``, ``ahead``. Functions that need fastconfig import it themselves, as the
process that installs it imports all of this first.
"""
