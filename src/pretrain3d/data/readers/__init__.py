"""Raw formats and public data sets, each read by one file."""

READERS = {
    "nndetection": "pretrain3d.data.readers.nndetection:NnDetection",
    "openkbp": "pretrain3d.data.readers.openkbp:OpenKbp",
    "images": "pretrain3d.data.readers.images:Images",
}
