"""The client: DICOM intake, chunks, transport to Triton, the session that turns a study into a report."""
