"""From boxes to numbers: score files, matching, AP, FROC, intervals, baselines; torch in `metric`, `segmentation`."""
