#define ISA portable
#define ISA_NAME "portable"
#include "isa.h"
