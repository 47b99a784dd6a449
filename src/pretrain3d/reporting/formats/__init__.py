"""Predicted boxes as files. Each format is one function; what it writes is in its docstring.

``TABLES`` write one file for all images: ``write(folder, classes, {case id: Found})``. ``FILES`` write one or two files
per image, as soon as it is predicted: ``write(folder, case id, classes, Found)``.
"""

TABLES = {
    "json": "pretrain3d.reporting.formats.tables:write_json_boxes",
    "csv": "pretrain3d.reporting.formats.tables:write_csv",
    "luna16": "pretrain3d.reporting.formats.tables:write_luna16",
    "coco": "pretrain3d.reporting.formats.tables:write_coco",
}

FILES = {
    "nndetection": "pretrain3d.reporting.formats.volumes:write_nndetection",
    "nifti": "pretrain3d.reporting.formats.volumes:write_nifti",
    "slicer": "pretrain3d.reporting.formats.slicer:write_slicer",
    "png": "pretrain3d.reporting.formats.overlay:write_png",
}
