"""Is it worth it? A grid of training runs: optimizers × rates × without and with teleports × seeds, on four problems.

problems   what is trained          measure   one run, its clock stopped while something is measured
jobs       which runs there are     runner    the runs in processes
records    what a run leaves        store     the file that it is kept in
results    what the records say     summary, tables, figure: and how it is shown
program    all of it
"""
