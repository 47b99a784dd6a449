"""From boxes to numbers: score files, matching, AP, FROC, intervals, baselines. Only `metric` imports torch."""
