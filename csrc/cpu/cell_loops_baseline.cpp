// The loops for all machines of the target architecture.
#define FCRN_INSTRUCTION_SET baseline
#include "cell_loops.h"
