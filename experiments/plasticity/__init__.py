"""Continual learning: what restores the ability to learn, and how much of what a network computes it keeps.

One multilayer perceptron learns one task after another. At each change of the task an arm may act on it. A network that
keeps its predictions and learns the next task as well as a fresh one has lost nothing. Each run records the accuracy on
every task, and the share of the predictions that each act has kept, on the samples it was given and on others.

tasks    what is learned: tasks with their changes, streams without, and control
arms     the networks of all seeds, and what each arm does to them
jobs     the suites of jobs, and what is recorded of one
runs     how a job is run on tasks and on streams
control  how one is run on CartPole
results  rows, tables and figures
"""

TEXT = "one task after another: what restores the ability to learn, and what it keeps; goes on where it stopped"
