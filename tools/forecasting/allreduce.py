"""How long an all-reduce takes, from the latency and the bandwidth of the links."""

import statistics

from tf_largebatch.errors import UserError


def ring(size: float, peers: int, latency: float, bandwidth: float) -> float:
  """Returns the seconds of a ring: 2 (p - 1) messages of a p-th of `size` bytes.

  Source: Patarasuk and Yuan 2009.
  """
  return 2 * (peers - 1) * (latency + size / peers / bandwidth)


def tree(size: float, peers: int, latency: float, bandwidth: float) -> float:
  """Returns the seconds of a pipelined double binary tree, up and down.

  Each peer passes every byte on, up and down. The latency is that of NCCL's own model of its tree
  (`src/graph/tuning.cc`: 2 ⌊log2 p⌋ messages), without the time that fills the pipeline.

  Source: Sanders, Speck and Träff 2009.
  """
  if peers == 1:
    return 0.0
  return 2 * (peers.bit_length() - 1) * latency + 2 * size / bandwidth


def halving_doubling(size: float, peers: int, latency: float, bandwidth: float) -> float:
  """Returns the seconds of recursive halving, then doubling.

  A power of two takes 2 log2 p messages. Other numbers of peers are split into blocks of powers of
  two (44 = 32 + 8 + 4; "binary blocks", as in Gloo's `docs/algorithms.md`): after its own halving,
  each process of a block of b sends its b-th of the bytes in B/b messages to the next larger block,
  of B processes, and gets it back before its doubling. Meanwhile the larger block does its own
  halving.

  Sources: Rabenseifner 2004; Thakur, Rabenseifner and Gropp 2005.
  """
  done, smaller = 0.0, 0
  for bit in range(peers.bit_length()):  # The smallest block first; the doubling mirrors this.
    block = 1 << bit
    if peers & block:
      own = bit * latency + (1 - 1 / block) * size / bandwidth
      sent = block / smaller * latency + size / smaller / bandwidth if smaller else 0.0
      done, smaller = max(own, done + sent), block
  return 2 * done


ALGORITHMS = {"ring": ring, "tree": tree, "halving_doubling": halving_doubling}


def fit(points: list[tuple[float, float, int]]) -> dict[str, float]:
  """Fits the latency and the bandwidth of a ring to points of (bytes, seconds, peers).

  Least squares of the errors relative to the measured times, because the sizes span many orders of
  magnitude.

  Raises:
    UserError: the points do not determine the latency and the bandwidth.
  """
  rows = [
    (ring(0, peers, 1, 1) / seconds, ring(size, peers, 0, 1) / seconds)
    for size, seconds, peers in points
  ]
  aa, ab, bb = (sum(row[i] * row[j] for row in rows) for i, j in ((0, 0), (0, 1), (1, 1)))
  determinant = aa * bb - ab * ab
  if determinant <= 1e-9 * aa * bb:
    raise UserError("--allreduce=FILE must have points of at least two very different sizes.")
  a, b = (sum(column) for column in zip(*rows, strict=True))
  latency, per_byte = (a * bb - b * ab) / determinant, (b * aa - a * ab) / determinant
  if latency < 0:  # Use the nearest value that is possible.
    latency, per_byte = 0.0, b / bb
  if per_byte <= 0:
    raise UserError("An all-reduce's seconds do not grow with its bytes; measure larger ones.")
  errors = [abs(latency * x + per_byte * y - 1) for x, y in rows]
  return {
    "latency_seconds": latency,
    "bandwidth_bytes_per_second": 1 / per_byte,
    "median_relative_error": statistics.median(errors),
    "worst_relative_error": max(errors),
  }
