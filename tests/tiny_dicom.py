"""DICOM series of small volumes."""

import zlib

import SimpleITK as sitk


def write_series(image, folder, *, series="1", modality="CT", places=None, shift=0.0):
    """The slices of a volume as DICOM files; `places` (mm) along the third axis replaces their distances."""
    folder.mkdir(parents=True, exist_ok=True)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    frame = f"1.2.826.0.1.3680043.2.1125.{zlib.crc32(f'{folder} {series}'.encode())}"
    for number in range(image.GetDepth()):
        part = image[:, :, number]
        x, y, z = image.TransformIndexToPhysicalPoint((0, 0, number))
        z = z if places is None else places[number]
        tags = {
            "0008|0060": modality,
            "0020|000e": f"{frame}.1",
            "0020|000d": f"{frame}.2",
            "0020|0052": f"{frame}.3",
            "0008|0018": f"{frame}.4.{number}",
            "0020|0011": series,
            "0020|0013": str(number),
            "0020|0032": f"{x}\\{y + shift * number}\\{z}",
            "0020|0037": "1\\0\\0\\0\\1\\0",
            "0018|0050": str(image.GetSpacing()[2]),
            "0010|0020": "P1",
            "0010|0010": "A^B",
            "0008|0016": "1.2.840.10008.5.1.4.1.1.2",
        }
        for tag, value in tags.items():
            part.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"{series}_{number:03d}.dcm"))
        writer.Execute(part)
    return folder
