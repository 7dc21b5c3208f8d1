// network.hpp - a network of a test's own, with faults that the host's network need not have.
#pragma once

#include <linux/netlink.h>
#include <linux/rtnetlink.h>
#include <net/if.h>
#include <sched.h>
#include <sys/ioctl.h>

#include "program.hpp"

namespace test {

// A network namespace with nothing but loopback; false: that is not allowed here. It is that of
// this thread, and of the threads and processes that it makes from now on.
inline bool own_network() {
    if (unshare(CLONE_NEWNET) != 0) return false;
    const int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    ifreq lo{};
    strcpy(lo.ifr_name, "lo");
    lo.ifr_flags = IFF_UP | IFF_RUNNING;
    const int result = ioctl(fd, SIOCSIFFLAGS, &lo);
    close(fd);
    if (result != 0) throw std::runtime_error("lo does not come up");
    return true;
}

// A setting of the own network, "ipv6/conf/all/disable_ipv6" for example.
inline void set_network(const std::string& name, const std::string& value) {
    std::ofstream file("/proc/sys/net/" + name);
    file << value << std::flush;
    CHECK_WHY(file.good(), name);
}

// A route of the own network that leads nowhere. `type`: RTN_BLACKHOLE, for which connect(2) fails
// with EINVAL, RTN_UNREACHABLE with EHOSTUNREACH, or RTN_PROHIBIT with EACCES.
inline void add_dead_route(const std::string& address, int type) {
    const bool six = contains(address, ":");
    struct {
        nlmsghdr header;
        rtmsg route;
        rtattr attribute;
        uint8_t destination[16];
    } request{};
    const unsigned short size = six ? 16 : 4;
    request.header.nlmsg_len = offsetof(decltype(request), destination) + size;
    request.header.nlmsg_type = RTM_NEWROUTE;
    request.header.nlmsg_flags = NLM_F_REQUEST | NLM_F_CREATE | NLM_F_ACK;
    request.route.rtm_family = six ? AF_INET6 : AF_INET;
    request.route.rtm_dst_len = uint8_t(8 * size);
    request.route.rtm_table = RT_TABLE_MAIN;
    request.route.rtm_protocol = RTPROT_STATIC;
    request.route.rtm_scope = RT_SCOPE_UNIVERSE;
    request.route.rtm_type = uint8_t(type);
    request.attribute.rta_len = uint16_t(sizeof request.attribute + size);
    request.attribute.rta_type = RTA_DST;
    CHECK_EQ(inet_pton(request.route.rtm_family, address.c_str(), request.destination), 1);
    struct {
        nlmsghdr header;
        nlmsgerr result;
        uint8_t rest[256];
    } reply{};
    const int fd = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE);
    CHECK_EQ(send(fd, &request, request.header.nlmsg_len, 0), ssize_t(request.header.nlmsg_len));
    CHECK(recv(fd, &reply, sizeof reply, 0) > 0);
    close(fd);
    CHECK_EQ(reply.header.nlmsg_type, NLMSG_ERROR);
    CHECK_EQ(reply.result.error, 0);
}

// A port on which connect(2) hangs, as if a firewall dropped what comes: its queue is full.
class Filtered {
public:
    Filtered() {
        listener_ = open_socket();
        sockaddr_in place{};
        place.sin_family = AF_INET;
        place.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        place.sin_port = htons(uint16_t(port));
        CHECK_EQ(bind(listener_, reinterpret_cast<sockaddr*>(&place), sizeof place), 0);
        CHECK_EQ(listen(listener_, 0), 0);
        for (int i = 0; i < 4; i++) {
            fillers_.push_back(open_socket());
            (void)!connect(fillers_.back(), reinterpret_cast<sockaddr*>(&place), sizeof place);
            usleep(20000);
        }
        pollfd last{fillers_.back(), POLLOUT, 0};
        CHECK_EQ(poll(&last, 1, 100), 0);
    }
    Filtered(const Filtered&) = delete;
    ~Filtered() {
        for (int fd : fillers_) close(fd);
        close(listener_);
    }
    std::string spec() const { return "127.0.0.1@" + std::to_string(port) + "#dot.test"; }
    const int port = free_port();

private:
    static int open_socket() {
        return socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    }
    int listener_;
    std::vector<int> fillers_;
};

}  // namespace test
