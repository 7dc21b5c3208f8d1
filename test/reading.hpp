// reading.hpp - what a message says, as text: an independent reader of messages, with every name in
// full. Two messages that say the same may differ in where their compression pointers point.
#pragma once

#include <set>

#include "program.hpp"

namespace test {

// Reads a whole message that parses. The OPT record is left out.
class Reading {
public:
    explicit Reading(const Octets& m) : m(m) {
        find_places();
        size_t at = 12;
        for (int i = 0; i < get16(m, 4); i++) {
            records.push_back(name(at) + hex(end_of_name(at), end_of_name(at) + 4));
            at = end_of_name(at) + 4;
        }
        for (int section = 1; section <= 3; section++)
            for (int i = 0; i < get16(m, 4 + 2 * section); i++) at = read_record(at, section);
        records.push_back("rest " + hex(at, m.size()));
    }

    // Whether another OPT record, of that size, cannot take the place of this one: a pointer goes
    // into it, or so far behind it that the place it would move to cannot be written.
    bool keeps_opt_from_moving(size_t size) const {
        if (opt.second == m.size()) return false;  // Nothing moves.
        for (size_t pointer : pointers) {
            const size_t target = size_t(get16(m, pointer) & 0x3fff);
            if (target >= opt.first && target < opt.second) return true;
            if (target >= opt.second && target - opt.second + opt.first + size > 0x3fff)
                return true;
        }
        return false;
    }

    std::vector<std::string> records;

private:
    // How many octets come before the names in the data of these types, and how many names there
    // are.
    static const std::pair<size_t, int>* names_in(int type) {
        static const std::map<int, std::pair<size_t, int>> all{
            {2, {0, 1}},  {3, {0, 1}},  {4, {0, 1}},  {5, {0, 1}},  {6, {0, 2}},  {7, {0, 1}},
            {8, {0, 1}},  {9, {0, 1}},  {12, {0, 1}}, {14, {0, 2}}, {15, {2, 1}}, {17, {0, 2}},
            {18, {2, 1}}, {21, {2, 1}}, {26, {2, 2}}, {33, {6, 1}}};
        const auto one = all.find(type);
        return one == all.end() ? nullptr : &one->second;
    }

    // The end of the name at `at`; 0: it does not end before `limit`, or is none.
    size_t end_of_name(size_t at, size_t limit = SIZE_MAX) const {
        const size_t start = at;
        limit = std::min(limit, m.size());
        while (at < limit && at - start < 255) {
            if (m[at] == 0) return at + 1;
            if (m[at] >= 0xc0) return at + 2 <= limit ? at + 2 : 0;
            if (m[at] > 63) return 0;
            at += 1 + m[at];
        }
        return 0;
    }

    // Notes where pointers are, and where the OPT record is.
    void find_places() {
        const auto note = [&](size_t from, size_t to) {
            if (to - from >= 2 && m[to - 2] >= 0xc0 && last_label(from) == to - 2)
                pointers.insert(to - 2);
        };
        size_t at = 12;
        for (int i = 0; i < get16(m, 4); i++) at = end_of_name(at) + 4;
        for (int i = 0; i < get16(m, 6) + get16(m, 8) + get16(m, 10); i++) {
            const size_t type_at = end_of_name(at), data = type_at + 10;
            const size_t end = data + size_t(get16(m, type_at + 8));
            note(at, type_at);
            if (get16(m, type_at) == 41) opt = {at, end};
            if (const auto* names = names_in(get16(m, type_at))) {
                size_t name_at = data + names->first;
                for (int n = 0; n < names->second && name_at < end; n++) {
                    const size_t name_end = end_of_name(name_at, end);
                    if (name_end == 0) break;
                    note(name_at, name_end);
                    name_at = name_end;
                }
            }
            at = end;
        }
    }

    // Where the last label, pointer or root of a name begins.
    size_t last_label(size_t at) const {
        while (m[at] != 0 && m[at] < 0xc0) at += 1 + m[at];
        return at;
    }

    // A name in full. What runs through a place that is none for a name is "odd": such a name says
    // nothing, and says something else when octets move.
    std::string name(size_t at) const {
        std::string words;
        for (int jumps = 0; jumps < 200;) {
            if (at < 12 || at >= m.size()) return words + " odd";
            const size_t length = m[at];
            if (opt.second > opt.first && at >= opt.first && at < opt.second && at != opt.first)
                return words + " odd";
            if (length >= 0xc0) {
                if (!pointers.count(at)) return words + " odd";
                at = size_t(get16(m, at) & 0x3fff);
                jumps++;
                continue;
            }
            if (length == 0) return words + ". ";
            const size_t end = at + 1 + length;
            const auto next = pointers.lower_bound(at > 0 ? at - 1 : 0);
            const bool has_pointer = next != pointers.end() && *next < end;
            const bool has_opt = opt.second > opt.first && at < opt.second && end > opt.first;
            if (end > m.size() || has_pointer || has_opt) return words + " odd";
            words += hex(at, end);
            at = end;
        }
        return words + " odd";
    }

    size_t read_record(size_t at, int section) {
        const size_t type_at = end_of_name(at), data = type_at + 10;
        const int type = get16(m, type_at);
        const size_t end = data + size_t(get16(m, type_at + 8));
        if (type == 41) return end;
        std::string line =
            std::to_string(section) + " " + name(at) + hex(type_at, type_at + 8) + ":";
        size_t rest = data;
        if (const auto* names = names_in(type)) {
            size_t name_at = data + names->first;
            for (int n = 0; n < names->second && name_at < end; n++) {
                const size_t name_end = end_of_name(name_at, end);
                if (name_end == 0) break;
                line += hex(rest, name_at) + "(" + name(name_at) + ")";
                name_at = rest = name_end;
            }
        }
        records.push_back(line + hex(rest, end));
        return end;
    }

    std::string hex(size_t from, size_t to) const {
        static const char digits[] = "0123456789abcdef";
        std::string out;
        for (size_t i = from; i < to && i < m.size(); i++) {
            out += digits[m[i] >> 4];
            out += digits[m[i] & 15];
        }
        return out;
    }

    const Octets& m;
    std::set<size_t> pointers;
    std::pair<size_t, size_t> opt{0, 0};
};

}  // namespace test
