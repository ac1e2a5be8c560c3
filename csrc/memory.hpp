// Memory as the operating system sees it.
#pragma once

#include <cstddef>

namespace fastconfig {

// Ask for huge pages, 2 MiB on most machines, in the whole pages inside a block. A block that nobody has touched is
// then mapped with one fault a huge page, not one for every 4 KiB. Nothing in memory changes. False where the system
// refuses, or knows no such advice.
bool advise_huge_pages(void* address, std::size_t bytes);

}  // namespace fastconfig
