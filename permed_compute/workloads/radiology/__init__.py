"""Radiology: DICOM series to volumes, networks over them, results as DICOM SEG and NIfTI in the source's geometry."""
