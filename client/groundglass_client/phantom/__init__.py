"""The phantom: a synthetic chest CT, with or without a ground-glass lesion, written as DICOM.

It is the demo's default study and the load of the benchmarks: nobody's patient, any number of slices, the same bytes
for the same settings.
"""

from groundglass_client.phantom.settings import SYNTAXES, PhantomSettings, parse_lesion
from groundglass_client.phantom.writing import write_phantom

__all__ = ["SYNTAXES", "PhantomSettings", "parse_lesion", "write_phantom"]
