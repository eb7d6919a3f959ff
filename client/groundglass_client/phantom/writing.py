"""Phantom -> DICOM files: one CT image per slice, in a folder that appears only when it is complete."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp
from typing import Final

import imagecodecs
import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import UID, CTImageStorage, JPEGLosslessSV1, generate_uid

from groundglass.errors import SettingError
from groundglass_client.phantom.chest import STORED_LOWEST_HU, Chest
from groundglass_client.phantom.settings import PhantomSettings
from groundglass_client.phantom.shapes import FIELD_OF_VIEW_MM

_BITS_STORED: Final = 12
_ENCODERS: Final = {"rle": "pylibjpeg", "jpeg-ls": "pyjpegls", "jpeg2000": "pylibjpeg"}


def write_phantom(settings: PhantomSettings, out: Path, progress: Callable[[int], None] = lambda slices: None) -> Path:
    """Write the phantom as DICOM files into the folder ``out``, and return it.

    The files' names do not follow the anatomy, as is usual in the wild: only the positions in their headers do. The
    folder is written beside ``out`` and renamed, so it is complete or not there. ``progress`` is called with the number
    of slices written so far. Raises SettingError if ``out`` holds something, or can't be written.
    """
    with _complete_folder(out) as folder:
        chest, header = Chest(settings), _header(settings)
        numbers = np.random.default_rng(settings.seed).permutation(settings.slices)
        for index, number in enumerate(numbers.tolist()):
            _describe_slice(header, settings, index)
            _set_pixels(header, chest.hu(index), settings)
            header.save_as(folder / f"IM{number + 1:05d}.dcm", enforce_file_format=True)
            progress(index + 1)
    return out


@contextmanager
def _complete_folder(out: Path) -> Iterator[Path]:
    """A new folder that takes the name ``out`` if the body succeeds, and vanishes if it does not."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SettingError(f"{out} exists and is not empty; name a new folder for the phantom")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as error:
        raise SettingError(f"{out}: no folder can be made there ({error.strerror})") from error
    try:
        yield folder
        folder.chmod(0o755)  # mkdtemp makes folders that only their owner can enter
        if out.exists():
            out.rmdir()
        folder.rename(out)
    except OSError as error:
        raise SettingError(f"{out}: the phantom can't be written ({error.strerror})") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _header(settings: PhantomSettings) -> Dataset:
    """What all slices of the phantom share."""
    pixel_mm = FIELD_OF_VIEW_MM / max(settings.rows, settings.columns)
    header = Dataset()
    header.file_meta = FileMetaDataset()
    header.file_meta.TransferSyntaxUID = settings.transfer_syntax
    header.SOPClassUID = header.file_meta.MediaStorageSOPClassUID = CTImageStorage
    header.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    header.Modality = "CT"
    header.Manufacturer = "Groundglass phantom"
    header.SeriesDescription = "Synthetic chest"
    header.PatientName, header.PatientID = "Phantom", "PHANTOM"
    header.PatientBirthDate = header.PatientSex = header.StudyDate = header.StudyTime = ""
    header.AccessionNumber = header.ReferringPhysicianName = header.StudyID = header.AcquisitionNumber = ""
    header.BodyPartExamined, header.PatientPosition, header.KVP = "CHEST", "HFS", 120
    header.StudyInstanceUID = _uid(settings, "study")
    header.SeriesInstanceUID = _uid(settings, "series")
    header.FrameOfReferenceUID = _uid(settings, "frame of reference")
    header.PositionReferenceIndicator = ""
    header.SeriesNumber = 1
    header.SliceThickness = round(settings.slice_distance_mm, 4)
    header.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    header.PixelSpacing = [round(pixel_mm, 6)] * 2
    header.SamplesPerPixel, header.PhotometricInterpretation = 1, "MONOCHROME2"
    header.Rows, header.Columns = settings.rows, settings.columns
    header.BitsAllocated, header.BitsStored, header.HighBit = 16, _BITS_STORED, _BITS_STORED - 1
    header.PixelRepresentation = 0
    header.RescaleIntercept, header.RescaleSlope, header.RescaleType = STORED_LOWEST_HU, 1, "HU"
    header.WindowCenter, header.WindowWidth = -600, 1500
    return header


def _uid(settings: PhantomSettings, what: str) -> str:
    """A valid UID that is the same for the same settings."""
    return str(generate_uid(entropy_srcs=[repr(settings), what]))


def _describe_slice(header: Dataset, settings: PhantomSettings, index: int) -> None:
    header.SOPInstanceUID = _uid(settings, f"slice {index}")
    header.file_meta.MediaStorageSOPInstanceUID = UID(header.SOPInstanceUID)
    header.InstanceNumber = index + 1
    pixel_mm = FIELD_OF_VIEW_MM / max(settings.rows, settings.columns)
    corner = [-round((side - 1) / 2 * pixel_mm, 4) for side in (settings.columns, settings.rows)]
    z_mm = round(-index * settings.slice_distance_mm, 4)  # z rises to the head, and slice 0 is the uppermost
    header.ImagePositionPatient = [*corner, z_mm]
    header.SliceLocation = z_mm


def _set_pixels(header: Dataset, hu: NDArray[np.int16], settings: PhantomSettings) -> None:
    """Put a slice, int16 (rows, columns) HU, into the header as 12-bit values, in the transfer syntax asked for."""
    stored = (hu - np.int16(STORED_LOWEST_HU)).astype(np.uint16)
    header.file_meta.TransferSyntaxUID = settings.transfer_syntax
    if settings.syntax in _ENCODERS:
        plugin = _ENCODERS[settings.syntax]
        header.compress(settings.transfer_syntax, stored, encoding_plugin=plugin, generate_instance_uid=False)
        return
    lossless_jpeg = settings.transfer_syntax == JPEGLosslessSV1
    header.PixelData = encapsulate([_lossless_jpeg(stored)]) if lossless_jpeg else stored.tobytes()
    header["PixelData"].VR = "OB" if lossless_jpeg else "OW"
    header["PixelData"].is_undefined_length = lossless_jpeg


def _lossless_jpeg(stored: NDArray[np.uint16]) -> bytes:
    """A slice, uint16 (rows, columns), as a lossless JPEG codestream of selection value 1."""
    encoded = imagecodecs.jpeg8_encode(stored, lossless=True, predictor=1, bitspersample=_BITS_STORED)
    return bytes(encoded)
