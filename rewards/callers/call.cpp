// After a candidate's code: a line per result on descriptor 3. The calls themselves are written below, one a row.
#include <cmath>
#include <cstdio>
#include <string>
#include <type_traits>
#include <unistd.h>
#include <vector>

namespace posttrain {
inline std::string text(const std::string &value) {
    std::string out = "\"";
    for (unsigned char c : value) {
        char escaped[8];
        if (c == '"' || c == '\\') out += '\\', out += c;
        else if (c < 0x20) std::snprintf(escaped, sizeof escaped, "\\u%04x", c), out += escaped;
        else out += c;
    }
    return out + "\"";
}
inline std::string text(const char *value) { return text(std::string(value)); }
inline std::string text(char value) { return text(std::string(1, value)); }
inline std::string text(bool value) { return value ? "true" : "false"; }
template <class T> std::enable_if_t<std::is_integral<T>::value, std::string> text(T value) {
    return std::to_string(value);
}
template <class T> std::enable_if_t<std::is_floating_point<T>::value, std::string> text(T value) {
    char digits[40];
    std::snprintf(digits, sizeof digits, "%.17g", (double)value);
    std::string out = digits;
    return std::isfinite(value) && out.find_first_of(".e") == std::string::npos ? out + ".0" : out;
}
template <class T> std::string text(const std::vector<T> &values) {
    std::string out = "{\"list\": [";
    for (size_t i = 0; i < values.size(); i++) out += (i ? ", " : "") + text((const T &)values[i]);
    return out + "]}";
}
template <class T> void send(const T &value) {
    dprintf(3, "@NONCE@ {\"value\": %s}\n", text(value).c_str());
}
}  // namespace posttrain

int main() {
@CALLS@
    return 0;
}
