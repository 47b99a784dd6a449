"""What a file or folder is, in plain lines: a function per kind, found by its name and imported on use."""

KINDS = {
    "raw data": "pretrain3d.reporting.inspection.data:raw_lines",
    "store": "pretrain3d.reporting.inspection.data:store_lines",
    "plan": "pretrain3d.reporting.inspection.data:plan_lines",
    "configuration": "pretrain3d.reporting.inspection.runs:configuration_lines",
    "run": "pretrain3d.reporting.inspection.runs:run_lines",
    "predictions": "pretrain3d.reporting.inspection.predicted:predicted_lines",
    "JSON": "pretrain3d.reporting.inspection.runs:json_lines",
    "weights": "pretrain3d.reporting.inspection.weights:weights_lines",
}
