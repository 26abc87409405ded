// Stands for the toolkit's header of this name where csrc/ is compiled by g++ with this folder on the include path.
#pragma once

#include "cuda_on_cpu.h"
