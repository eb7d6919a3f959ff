"""DICOM files for the intake tests: small CT slices with any attribute changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, EnhancedCTImageStorage, ExplicitVRLittleEndian, generate_uid

SIDE = 16


def ct_slice(z_mm: float = 0.0, **changes: Any) -> Dataset:
    """An axial CT slice of 16x16 pixels, all of -1000 HU; ``changes`` are DICOM keywords."""
    slice_ = Dataset()
    slice_.file_meta = FileMetaDataset()
    slice_.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    slice_.SOPClassUID = CTImageStorage
    slice_.SOPInstanceUID = generate_uid(entropy_srcs=[str(z_mm)])
    slice_.Modality = "CT"
    slice_.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    slice_.PatientName, slice_.PatientID = "Secret^Name", "SECRET-ID"
    slice_.StudyInstanceUID, slice_.SeriesInstanceUID, slice_.SeriesNumber = "1.2.3", "1.2.3.4", 2
    slice_.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    slice_.ImagePositionPatient = [0, 0, z_mm]
    slice_.PixelSpacing = [0.7, 0.7]
    slice_.SamplesPerPixel, slice_.PhotometricInterpretation = 1, "MONOCHROME2"
    slice_.BitsAllocated, slice_.BitsStored, slice_.HighBit, slice_.PixelRepresentation = 16, 12, 11, 0
    slice_.RescaleSlope, slice_.RescaleIntercept = 1, -1024
    set_values(slice_, np.full((SIDE, SIDE), 24, dtype=np.uint16))
    for keyword, value in changes.items():
        setattr(slice_, keyword, value)
    return slice_


def set_values(slice_: Dataset, values: NDArray[Any]) -> None:
    """Stored values, (rows, columns) or (frames, rows, columns), as uncompressed pixel data."""
    slice_.Rows, slice_.Columns = values.shape[-2:]
    slice_.PixelData = values.tobytes()
    slice_["PixelData"].VR = "OW"


def enhanced_ct(positions_mm: list[float], intercepts_hu: list[float]) -> Dataset:
    """An Enhanced CT of 16x16 pixels, its frames at those heights; frame i holds the value i and its own rescale."""
    image = ct_slice()
    image.SOPClassUID = EnhancedCTImageStorage
    described_by_frame = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing")
    for keyword in (*described_by_frame, "RescaleSlope", "RescaleIntercept"):
        delattr(image, keyword)
    image.SharedFunctionalGroupsSequence = _item(
        PlaneOrientationSequence=_item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0]),
        PixelMeasuresSequence=_item(PixelSpacing=[0.7, 0.7]),
    )
    image.PerFrameFunctionalGroupsSequence = [
        _item(
            PlanePositionSequence=_item(ImagePositionPatient=[0, 0, z_mm]),
            PixelValueTransformationSequence=_item(RescaleSlope=1, RescaleIntercept=intercept, RescaleType="HU"),
        )[0]
        for z_mm, intercept in zip(positions_mm, intercepts_hu, strict=True)
    ]
    image.NumberOfFrames = len(positions_mm)
    set_values(image, np.arange(len(positions_mm), dtype=np.uint16)[:, None, None].repeat(SIDE, 1).repeat(SIDE, 2))
    return image


def _item(**attributes: Any) -> list[Dataset]:
    """A sequence of one item."""
    item = Dataset()
    for keyword, value in attributes.items():
        setattr(item, keyword, value)
    return [item]


def save(dataset: Dataset, path: Path) -> Path:
    """Write a DICOM file, its folder with it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = "1.2.3.4.5"
    dataset.save_as(path, enforce_file_format=True)
    return path
