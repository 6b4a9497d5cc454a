"""Programs over the package; what would change their results is ignored before Keras starts."""

import sys

from tf_largebatch import foreign_settings
from tf_largebatch.errors import UserError
from tf_largebatch.signals import print_line

try:
  if _ignored := foreign_settings.ignore():
    print_line(f"Ignored {', '.join(_ignored)}, which would change what is computed.")
except UserError as error:
  print_line(f"error: {error}")
  sys.exit(error.status)
