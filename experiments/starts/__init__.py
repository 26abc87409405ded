"""How fast a network learns from where it starts: PyTorch's own start, tuned initialisations, standardised teleports.

Each arm is run at several rates, more of them while the best is the last one on either side, and is compared at its own
best. The answer is in epochs to a train loss, and in what stands against it: the validation loss, the accuracy under
noise in the inputs at equal train loss, the norm of the weights, and the time of the teleports.

`problems` says what is trained, `arms` from where, `runs` trains, and `results` chooses the rates and tells.
"""
