"""Intake: a study on disk becomes slices of Hounsfield units in anatomical order.

What becomes of a file
----------------------

==================================================== =========================== ===================================
the file is                                          in a folder, zip, DICOMDIR  given as the study itself
==================================================== =========================== ===================================
a CT slice (also each frame of an Enhanced CT)       grouped into its series     the study
a CT localizer                                       in ``other_series``         NoSeries
another DICOM object (CR, US, MR, SEG, SR, ...)      in ``ignored``              NotACtSlice
a CT object whose pixels are colours or no HU        in ``ignored``              NotACtSlice
a DICOMDIR, a text file, a resource fork, a pipe     in ``ignored``              NotACtSlice (DICOMDIR: its files)
a PNG or JPEG, no DICOM slice in the study           a series with its folder    the study
a PNG or JPEG beside DICOM slices                    in ``ignored``              -
DICOM by name, but empty, truncated or broken        UnreadableFile *            UnreadableFile
in a transfer syntax that no decoder here reads      UnreadableFile *            UnreadableFile
listed in a DICOMDIR and missing                     UnreadableFile *            -
of another size or orientation than its series       GeometryError *             -
a second slice at one position                       in ``duplicates``           -
==================================================== =========================== ===================================

(*) with ``skip_bad`` the file is counted in ``refused`` instead, and the rest is analysed.

Damage that only decoding shows (inside a compressed slice) is raised by :func:`decode_hu`. Nothing is left out
silently.
"""

from groundglass_client.intake.opening import open_study
from groundglass_client.intake.pixels import decode_hu

__all__ = ["decode_hu", "open_study"]
