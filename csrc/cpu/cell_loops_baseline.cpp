// The loops for every machine of the architecture compiled for.
#define FCRN_INSTRUCTION_SET baseline
#include "cell_loops.h"
