import os

# The matrices of the tests are small: NumPy's threads would cost more than they bring.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
