// upstream.cpp - see upstream.hpp. A thread for each connection; nothing here is the proxy's code.
#include "upstream.hpp"

#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <openssl/err.h>
#include <openssl/evp.h>
#include <openssl/pem.h>
#include <openssl/ssl.h>
#include <openssl/x509v3.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <stdexcept>

#include "records.hpp"

namespace test {

TempDir::TempDir() {
    char name[] = "/tmp/dot-proxy-test-XXXXXX";
    if (!mkdtemp(name)) throw std::runtime_error("mkdtemp");
    path = name;
}
TempDir::~TempDir() {
    std::error_code ignored;
    std::filesystem::remove_all(path, ignored);
}

// ---- Certificates ------------------------------------------------------------------------------

// Who signs: the CA, another, and one that the CA signed as a CA, or as none. -1: the key itself.
enum { TheCa, OtherCa, Intermediate, NoCa };
static const struct {
    Cert kind;
    const char *file, *cn, *san;  // san: nullptr: none
    long from, until;             // days from now
    int issuer;
    const char* usage = "serverAuth";
    bool chain = false;  // the issuer's certificate is sent too
    int ballast = 0;     // octets of a comment in it
    int copies = 0;      // how often the issuer's certificate is sent once more
} leaves[] = {
    {Cert::Good, "good", "dot.test", "DNS:dot.test", -1, 30, TheCa},
    {Cert::WrongName, "wrong", "dot.test", "DNS:other.test", -1, 30, TheCa},
    {Cert::Expired, "expired", "dot.test", "DNS:dot.test", -30, -1, TheCa},
    {Cert::NotYetValid, "early", "dot.test", "DNS:dot.test", 5, 30, TheCa},
    {Cert::UnknownCa, "unknown", "dot.test", "DNS:dot.test", -1, 30, OtherCa},
    {Cert::SelfSigned, "self", "dot.test", "DNS:dot.test", -1, 30, -1},
    {Cert::CnOnly, "cn", "dot.test", nullptr, -1, 30, TheCa},
    {Cert::Wildcard, "wild", "x", "DNS:*.lab.test", -1, 30, TheCa},
    {Cert::ClientOnly, "client", "dot.test", "DNS:dot.test", -1, 30, TheCa, "clientAuth"},
    {Cert::Backup, "backup", "dot.test", "DNS:dot.test", -1, 30, TheCa},
    {Cert::Chained, "chained", "x", "DNS:dot.test", -1, 30, Intermediate, "serverAuth", true},
    {Cert::NoIntermediate, "alone", "x", "DNS:dot.test", -1, 30, Intermediate},
    {Cert::FalseCa, "false", "x", "DNS:dot.test", -1, 30, NoCa, "serverAuth", true},
    {Cert::IpAddress, "ip", "x", "IP:127.0.0.1", -1, 30, TheCa},
    {Cert::Fair28kB, "fair", "x", "DNS:dot.test", -1, 30, TheCa, "serverAuth", false, 28000},
    {Cert::Large77kB, "large", "x", "DNS:dot.test", -1, 30, TheCa, "serverAuth", false, 77000},
    {Cert::Chain77kB, "long", "x", "DNS:dot.test", -1, 30, Intermediate, "serverAuth", true, 0,
     230},
    {Cert::Huge105kB, "huge", "x", "DNS:dot.test", -1, 30, TheCa, "serverAuth", false, 105000},
};
static const auto& leaf_of(Cert kind) {
    return *std::find_if(std::begin(leaves), std::end(leaves),
                         [&](auto& l) { return l.kind == kind; });
}

static void extend(X509* cert, X509* issuer, int nid, const char* value) {
    X509V3_CTX ctx;
    X509V3_set_ctx(&ctx, issuer, cert, nullptr, nullptr, 0);
    X509_EXTENSION* e = X509V3_EXT_conf_nid(nullptr, &ctx, nid, value);
    if (!e) throw std::runtime_error("extension");
    X509_add_ext(cert, e, -1);
    X509_EXTENSION_free(e);
}

static X509* make_cert(EVP_PKEY* key, const char* cn, long from, long until, X509* issuer) {
    static std::atomic<long> serial{time(nullptr)};
    X509* cert = X509_new();
    X509_set_version(cert, 2);
    ASN1_INTEGER_set(X509_get_serialNumber(cert), ++serial);
    X509_gmtime_adj(X509_getm_notBefore(cert), from * 86400);
    X509_gmtime_adj(X509_getm_notAfter(cert), until * 86400);
    X509_set_pubkey(cert, key);
    X509_NAME* name = X509_get_subject_name(cert);
    X509_NAME_add_entry_by_txt(name, "CN", MBSTRING_ASC, (const uint8_t*)cn, -1, -1, 0);
    X509_set_issuer_name(cert, issuer ? X509_get_subject_name(issuer) : name);
    return cert;
}

static void save(const std::string& path, const std::vector<X509*>& certs, EVP_PKEY* key) {
    FILE* f = fopen(path.c_str(), "w");
    if (!f) throw std::runtime_error(path);
    for (X509* cert : certs) PEM_write_X509(f, cert);
    if (key) PEM_write_PrivateKey(f, key, nullptr, nullptr, 0, nullptr, nullptr);
    fclose(f);
}

Certificates::Certificates() {
    EVP_PKEY* keys[4];
    X509* cas[4];
    const char* names[] = {"test CA", "another CA", "intermediate CA", "no CA"};
    for (int i : {TheCa, OtherCa, Intermediate, NoCa}) {
        const int signer = i == OtherCa ? OtherCa : TheCa;
        keys[i] = EVP_EC_gen("P-256");
        cas[i] = make_cert(keys[i], names[i], -40, 40, signer == i ? nullptr : cas[signer]);
        extend(cas[i], cas[signer], NID_basic_constraints,
               i == NoCa ? "critical,CA:FALSE" : "critical,CA:TRUE");
        X509_sign(cas[i], keys[signer], EVP_sha256());
    }
    save(ca(), {cas[TheCa]}, nullptr);
    save(intermediate(), {cas[Intermediate]}, nullptr);
    for (auto& l : leaves) {
        EVP_PKEY* key = EVP_EC_gen("P-256");
        X509* issuer = l.issuer < 0 ? nullptr : cas[l.issuer];
        X509* cert = make_cert(key, l.cn, l.from, l.until, issuer);
        if (l.san) extend(cert, issuer ? issuer : cert, NID_subject_alt_name, l.san);
        extend(cert, issuer ? issuer : cert, NID_ext_key_usage, l.usage);
        if (l.ballast)
            extend(cert, issuer, NID_netscape_comment, std::string(l.ballast, 'x').c_str());
        X509_sign(cert, issuer ? keys[l.issuer] : key, EVP_sha256());
        std::vector<X509*> sent{cert};
        if (l.chain) sent.insert(sent.end(), size_t(1 + l.copies), issuer);
        save(leaf(l.kind), sent, nullptr);
        save(this->key(l.kind), {}, key);
        X509_free(cert);
        EVP_PKEY_free(key);
    }
    for (int i = 0; i < 4; i++) {
        X509_free(cas[i]);
        EVP_PKEY_free(keys[i]);
    }
}
std::string Certificates::leaf(Cert kind) const {
    return dir.path + "/" + leaf_of(kind).file + ".pem";
}
std::string Certificates::key(Cert kind) const {
    return dir.path + "/" + leaf_of(kind).file + ".key";
}
std::string Certificates::pin(const std::string& file) {
    FILE* f = fopen(file.c_str(), "r");
    X509* cert = PEM_read_X509(f, nullptr, nullptr, nullptr);
    fclose(f);
    uint8_t *der = nullptr, hash[32], text[48];
    const int size = i2d_X509_PUBKEY(X509_get_X509_PUBKEY(cert), &der);
    EVP_Digest(der, size, hash, nullptr, EVP_sha256(), nullptr);
    EVP_EncodeBlock(text, hash, 32);
    OPENSSL_free(der);
    X509_free(cert);
    return (char*)text;
}

// ---- Answers -----------------------------------------------------------------------------------

static int u16(const Octets& m, size_t at) { return m[at] << 8 | m[at + 1]; }
static void put16(Octets& m, int v) {
    m.push_back(uint8_t(v >> 8));
    m.push_back(uint8_t(v));
}

struct Question {
    std::string label;  // the first, in lower case
    size_t end = 12;
    int type = 0;
    bool opt = false, padding = false;
};
static Question read_question(const Octets& q) {
    Question r;
    if (q.size() < 12 || u16(q, 4) == 0) return r;
    size_t at = 12;
    for (int i = 0; i < q[12]; i++) r.label += char(tolower(q[13 + i]));
    while (at < q.size() && q[at]) at += 1 + q[at];
    r.type = u16(q, at + 1);
    r.end = at + 5;
    for (size_t i = r.end; i + 11 <= q.size() && u16(q, 10) > 0; i += 11 + u16(q, i + 9)) {
        if (q[i] != 0 || u16(q, i + 1) != 41) continue;
        r.opt = true;
        for (size_t o = i + 11; o + 4 <= i + 11 + u16(q, i + 9); o += 4 + u16(q, o + 2))
            r.padding |= u16(q, o) == 12;
        break;
    }
    return r;
}

static void add_opt(Octets& a, int ext_rcode, const Octets& options, bool pad) {
    a[11]++;
    const size_t at = a.size();
    for (int octet : {0, 0, 41, 4096 >> 8, 4096 & 255, ext_rcode, 0, 0, 0, 0, 0})
        a.push_back(uint8_t(octet));
    a.insert(a.end(), options.begin(), options.end());
    if (pad) {  // RFC 8467 4.2: to 468
        const size_t padding = (468 - (a.size() + 4) % 468) % 468;
        put16(a, 12);
        put16(a, int(padding));
        a.insert(a.end(), padding, 0xff);  // any value must be accepted
    }
    const size_t length = a.size() - at - 11;
    a[at + 9] = uint8_t(length >> 8);
    a[at + 10] = uint8_t(length);
}

// A record of `type`; its owner is the question's name, by a pointer, unless another is given.
static void add_record(Octets& a, int type, const Octets& data, int klass = 1,
                       const Octets& owner = {0xc0, 0x0c}) {
    a[7]++;
    a.insert(a.end(), owner.begin(), owner.end());
    for (int octet : {type >> 8, type & 255, klass >> 8, klass & 255, 0, 0, 0, 60})
        a.push_back(uint8_t(octet));
    put16(a, int(data.size()));
    a.insert(a.end(), data.begin(), data.end());
}

// Records that a proxy has no reason to read, and may break if it does.
static void add_oddities(Octets& a, const std::string& key, const Octets& question_name) {
    Octets pointer{0xc0, 0x0c}, upper = question_name;
    for (auto& octet : upper) octet = uint8_t(toupper(octet));
    if (key == "unknown") {  // data that looks like pointers, and like names in two cases
        add_record(a, 65280, {0xc0, 0x0c, 0xff, 0xff, 0xc0, 3, 'C', 'o', 'M', 0, 0xc0}, 65280);
        add_record(a, 65280, upper, 255, upper);  // no compression at all
    }
    if (key == "pointers") {  // an owner that is a pointer into the data of another record
        add_record(a, 5, {1, 'X', 0xc0, 0x0c});
        const size_t data = a.size() - 4;
        add_record(a, 1, {1, 2, 3, 4}, 1, {uint8_t(0xc0 | data >> 8), uint8_t(data)});
    }
    for (int left = key == "chain" ? 100 : 0; left > 0; left--) {  // each to the one before it
        add_record(a, 5, pointer);
        const size_t data = a.size() - 2;
        pointer = {uint8_t(0xc0 | data >> 8), uint8_t(data)};
    }
}

// An answer to `q`: A has an address made of the name, so that answers can be told apart.
static Octets answer(const Octets& q, const Question& question, const std::string& key,
                     int number) {
    Octets a(q.begin(), q.begin() + question.end);
    a[2] = uint8_t(a[2] | 0x84);
    a[3] = uint8_t((a[3] & 0x70) | 0x80);
    std::fill(a.begin() + 6, a.begin() + 12, 0);
    if (key == "txt" || (key == "tsig" && number > 0)) {
        Octets data;
        for (int left = number; left > 0; left -= 255) {
            data.push_back(uint8_t(std::min(left, 255)));
            data.insert(data.end(), std::min(left, 255), 'x');
        }
        add_record(a, 16, data);
    } else if (key == "size") {  // of the whole message, without OPT
        Octets data(number - a.size() - 12);
        for (size_t i = 0; i < data.size(); i++) data[i] = uint8_t(i + i / 251);
        add_record(a, 65280, data);
        return a;
    } else if (question.type == 1) {
        uint32_t hash = 2166136261u;
        for (size_t i = 12; i < question.end - 4; i++)
            hash = (hash ^ uint32_t(tolower(q[i]))) * 16777619u;
        add_record(a, 1,
                   {uint8_t(hash >> 24), uint8_t(hash >> 16), uint8_t(hash >> 8), uint8_t(hash)});
    }
    if (question.end > 12) add_oddities(a, key, {q.begin() + 12, q.begin() + question.end - 4});
    Octets options;
    if (key == "ede") options = {0, 15, 0, 4, 0, 22, 'h', 'i'};
    if (key == "keepalive") options = {0, 11, 0, 2, 0, 100, 0, 100, 0, 3, 'a', 'b', 'c'};
    const int ext = key == "badvers" || key == "badcookie" ? 1 : 0;
    if (key == "badcookie") a[3] |= 7;
    if ((question.opt && key != "noopt") || key == "always")
        add_opt(a, ext, options, question.padding);
    if (key == "tsig") {
        add_record(a, 250, Octets(20, 7), 255, {3, 'k', 'e', 'y', 0});
        a[7]--;
        a[11]++;
    }
    if (key == "tc") a[2] |= 2;
    if (key == "ad") a[3] |= 0x20;
    if (key == "folded")
        for (size_t i = 12; i < question.end - 4; i++) a[i] = uint8_t(toupper(a[i]));
    if (key == "wrongid") a[1] ^= 1;
    if (key == "wrongname") a[13] = a[13] == 'x' ? 'y' : 'x';
    if (key == "wrongtype") a[question.end - 3] ^= 0x20;
    if (key == "wrongclass") a[question.end - 1] = 3;
    if (key == "query") a[2] &= 0x7f;
    if (key == "headeronly") {
        a.resize(12);
        std::fill(a.begin() + 4, a.end(), 0);
    }
    if (key == "refused") {
        a.resize(12);
        std::fill(a.begin() + 4, a.end(), 0);
        a[3] = 5;
    }
    if (key == "formerr") {
        a.resize(12);
        std::fill(a.begin() + 4, a.end(), 0);
        a[3] = 1;
    }
    if (key == "servfail") a[3] |= 2;
    if (key == "short") a[7] = 9;  // more records announced than there are
    return a;
}

// ---- The server --------------------------------------------------------------------------------

struct Upstream::Shared {
    mutable std::mutex mutex;  // guards all but `certificates`
    std::condition_variable changed;
    Options options;
    Seen seen;
    std::map<std::string, int> faults;  // how often a name has been maltreated
    std::map<Cert, SSL_CTX*> contexts;
    std::set<int> fds;
    int served = 0;                      // connections, of those that are open
    int silent = 0;                      // so many connections, the first ones, get no answer
    std::map<int, std::thread> threads;  // one for each connection, by its number
    std::vector<int> ended;              // those to be joined
    bool stopping = false;
    int listener = -1;
    std::string alpn;  // set once
    std::string cert_file[32], key_file[32];

    ~Shared() {
        for (auto& [kind, ctx] : contexts) SSL_CTX_free(ctx);
    }
    bool sleep(int ms) {  // false: it is to stop
        std::unique_lock lock(mutex);
        return !changed.wait_for(lock, std::chrono::milliseconds(ms), [&] { return stopping; });
    }
    Options now() const {
        std::lock_guard lock(mutex);
        return options;
    }
    SSL* make_ssl(const Options& o);
    void start(int fd);
    void serve(int fd, int number, const Options& o);
    bool serve_query(SSL* ssl, int fd, int connection, const Octets& query);
    bool is_silent(int connection) const {
        std::lock_guard lock(mutex);
        return connection <= silent;
    }
    bool misbehave(SSL* ssl, int fd, const std::string& key, int number, const Octets& framed);
    void talk_without_end(Endless what, int pause_ms, SSL* ssl, int fd);
    bool answer_by_script(const Options& o, SSL* ssl, const Octets& query);
};

static Hello read_hello(SSL* ssl) {
    Hello hello;
    const uint8_t* data;
    size_t size;
    auto extension = [&](unsigned type) {
        return SSL_client_hello_get0_ext(ssl, type, &data, &size) == 1;
    };
    if (extension(TLSEXT_TYPE_server_name) && size > 5) hello.name.assign(data + 5, data + size);
    if (extension(TLSEXT_TYPE_application_layer_protocol_negotiation) && size > 3)
        hello.alpn.assign(data + 3, data + size);
    if (extension(TLSEXT_TYPE_supported_versions) && size > 1)
        hello.versions.assign(data + 1, data + size);
    size = SSL_client_hello_get0_compression_methods(ssl, &data);
    hello.compressions.assign(data, data + size);
    int* types;
    if (SSL_client_hello_get1_extensions_present(ssl, &types, &size)) {
        hello.extensions.insert(types, types + size);
        OPENSSL_free(types);
    }
    return hello;
}

// Of TLS 1.3, or one of TLS 1.2: there an empty one only says that the client takes tickets.
static bool offers_ticket(SSL* ssl) {
    const uint8_t* data;
    size_t size;
    if (SSL_client_hello_get0_ext(ssl, TLSEXT_TYPE_psk, &data, &size)) return true;
    return SSL_client_hello_get0_ext(ssl, TLSEXT_TYPE_session_ticket, &data, &size) && size > 0;
}

static int on_alpn(SSL*, const uint8_t** out, uint8_t* size, const uint8_t*, unsigned, void* arg) {
    static thread_local std::string chosen;
    chosen = *static_cast<std::string*>(arg);
    if (chosen.empty()) return SSL_TLSEXT_ERR_NOACK;
    *out = reinterpret_cast<const uint8_t*>(chosen.data());
    *size = uint8_t(chosen.size());
    return SSL_TLSEXT_ERR_OK;
}

SSL* Upstream::Shared::make_ssl(const Options& o) {
    std::lock_guard lock(mutex);
    SSL_CTX*& ctx = contexts[o.cert];
    if (!ctx) {  // one for each certificate, so that tickets are good for later connections
        ctx = SSL_CTX_new(TLS_server_method());
        SSL_CTX_set_session_id_context(ctx, (const uint8_t*)"test", 4);
        SSL_CTX_use_certificate_chain_file(ctx, cert_file[int(o.cert)].c_str());
        SSL_CTX_use_PrivateKey_file(ctx, key_file[int(o.cert)].c_str(), SSL_FILETYPE_PEM);
        SSL_CTX_set_client_hello_cb(
            ctx,
            [](SSL* ssl, int* alert, void* arg) {
                auto& shared = *static_cast<Shared*>(arg);
                const uint8_t* data;
                size_t size;
                std::lock_guard lock(shared.mutex);
                shared.seen.hellos.push_back(read_hello(ssl));
                if (SSL_client_hello_get0_ext(ssl, TLSEXT_TYPE_psk, &data, &size) && size > 4) {
                    const size_t length = std::min<size_t>(size - 4, data[2] << 8 | data[3]);
                    shared.seen.tickets.emplace_back(data + 4, data + 4 + length);
                }
                if (!offers_ticket(ssl)) return SSL_CLIENT_HELLO_SUCCESS;
                if (shared.options.hang_ticket) return SSL_CLIENT_HELLO_RETRY;
                if (!shared.options.alert_ticket) return SSL_CLIENT_HELLO_SUCCESS;
                *alert = SSL_AD_HANDSHAKE_FAILURE;
                return SSL_CLIENT_HELLO_ERROR;
            },
            this);
        Records::watch(ctx);
        if (o.ticket_lifetime >= 0) SSL_CTX_set_timeout(ctx, o.ticket_lifetime);
        // It is offered, so that a client that would use it does; tickets stay stateless.
        SSL_CTX_set_max_early_data(ctx, 16384);
        SSL_CTX_set_options(ctx, SSL_OP_NO_ANTI_REPLAY);
        if (o.max_version && o.max_version < TLS1_2_VERSION)
            SSL_CTX_set_cipher_list(ctx, "ALL:@SECLEVEL=0");
    }
    SSL_CTX_set_alpn_select_cb(ctx, on_alpn, &alpn);
    SSL* ssl = SSL_new(ctx);
    SSL_set_num_tickets(ssl, o.tickets);
    if (o.min_version) SSL_set_min_proto_version(ssl, o.min_version);
    if (o.max_version) {
        SSL_set_min_proto_version(ssl, std::min(o.max_version, TLS1_2_VERSION));
        SSL_set_max_proto_version(ssl, o.max_version);
    }
    if (!o.ciphers.empty()) SSL_set_cipher_list(ssl, o.ciphers.c_str());
    if (!o.groups.empty()) SSL_set1_groups_list(ssl, o.groups.c_str());
    return ssl;
}

static bool send_all(SSL* ssl, const Octets& octets) {
    return octets.empty() || SSL_write(ssl, octets.data(), int(octets.size())) > 0;
}

// What a key does besides changing the answer. true: the connection is to go on.
bool Upstream::Shared::misbehave(SSL* ssl, int fd, const std::string& key, int number,
                                 const Octets& framed) {
    const size_t half = framed.size() / 2;
    if (key == "close") {
        SSL_shutdown(ssl);
        return false;
    }
    if (key == "reset") {
        linger now{1, 0};
        setsockopt(fd, SOL_SOCKET, SO_LINGER, &now, sizeof now);
        return false;
    }
    if (key == "cutclean") {
        send_all(ssl, {framed.begin(), framed.begin() + half});
        SSL_shutdown(ssl);
        return false;
    }
    if (key == "cut") {
        send_all(ssl, {framed.begin(), framed.begin() + half});
        return false;
    }
    if (key == "halflength") {
        send_all(ssl, {framed[0]});
        return false;
    }
    if (key == "silent") {
        while (sleep(100)) {
        }
        return false;
    }
    if (key == "drip") {
        send_all(ssl, {0xff, 0xff});
        while (sleep(20) && send_all(ssl, {0})) {
        }
        return false;
    }
    if (key == "dripped") {  // the whole answer, an octet to a record
        for (uint8_t octet : framed)
            if (!send_all(ssl, {octet})) return false;
        return true;
    }
    if (key == "garbage") {
        send_all(ssl, Octets(300, 0xa5));
        while (sleep(100)) {
        }
        return false;
    }
    if (key == "zero") {
        send_all(ssl, {0, 0});
        return send_all(ssl, framed);
    }
    if (key == "five") {
        return send_all(ssl, {0, 5, 1, 2, 3, 4, 5});
    }
    if (key == "long") {
        send_all(ssl, {0xff, 0xff});
        while (sleep(100)) {
        }
        return false;
    }
    if (key == "two") {
        Octets twice = framed;
        twice.insert(twice.end(), framed.begin(), framed.end());
        return send_all(ssl, twice);
    }
    if (key == "before" || key == "stray") {  // an answer to another question
        Octets other = framed;
        other[2 + 13] ^= 1;
        if (key == "before") return send_all(ssl, other) && send_all(ssl, framed);
        return send_all(ssl, framed) && sleep(number) && send_all(ssl, other);
    }
    if (key == "renegotiate") {
        SSL_renegotiate(ssl);
        SSL_do_handshake(ssl);  // sends the request, and waits for nothing
        return send_all(ssl, framed);
    }
    if (key == "keyupdate") {
        SSL_key_update(ssl, SSL_KEY_UPDATE_REQUESTED);
        return send_all(ssl, framed);
    }
    if (key == "unclean") {
        send_all(ssl, framed);
        shutdown(fd, SHUT_WR);
        return false;
    }
    return send_all(ssl, framed);
}

bool Upstream::Shared::serve_query(SSL* ssl, int fd, int connection, const Octets& query) {
    const Question question = read_question(query);
    const size_t digits = std::find_if(question.label.begin(), question.label.end(),
                                       [](char c) { return !isalpha(c); }) -
                          question.label.begin();
    std::string key = question.label.substr(0, digits);
    const int number = atoi(question.label.c_str() + digits);
    const Options o = now();
    if (o.deaf) {
        while (now().deaf && sleep(50)) {
        }
        return false;
    }
    if (o.endless_after_query) {
        talk_without_end(o.endless, o.endless_pause_ms, ssl, fd);
        return false;
    }
    if (o.script && answer_by_script(o, ssl, query)) return true;
    if (o.refuses && o.refuses(query)) {
        SSL_shutdown(ssl);
        return false;
    }
    if (key == "cutat") {  // CUTAT: close after NUMBER octets of the framed answer
        Octets a = answer(query, question, "a", 0),
               framed{uint8_t(a.size() >> 8), uint8_t(a.size())};
        framed.insert(framed.end(), a.begin(), a.end());
        {
            std::lock_guard lock(mutex);
            seen.answers.push_back(a);
        }
        send_all(ssl, {framed.begin(), framed.begin() + std::min<size_t>(number, framed.size())});
        return false;
    }
    static const std::set<std::string> counted{"close",    "reset",   "cut",
                                               "cutclean", "wrongid", "silent"};
    if (counted.count(key) && number) {
        std::lock_guard lock(mutex);
        if (++faults[question.label] > number) key = "a";
    }
    if (key == "slow" && !sleep(number)) return false;
    if (o.delay_ms && !sleep(o.delay_ms)) return false;
    if (is_silent(connection)) {
        while (sleep(50)) {
        }
        return false;
    }
    const Octets a = answer(query, question, key, number);
    Octets framed{uint8_t(a.size() >> 8), uint8_t(a.size())};
    framed.insert(framed.end(), a.begin(), a.end());
    {
        std::lock_guard lock(mutex);
        seen.answers.push_back(a);
    }
    if (!o.unasked.empty() && o.unasked_when == Options::WithAnswer) {
        put16(framed, int(o.unasked.size()));
        framed.insert(framed.end(), o.unasked.begin(), o.unasked.end());
    }
    const bool go_on = misbehave(ssl, fd, key, number, framed);
    if (!go_on || o.unasked.empty() || o.unasked_when != Options::AfterAnswer) return go_on;
    Octets more{uint8_t(o.unasked.size() >> 8), uint8_t(o.unasked.size())};
    more.insert(more.end(), o.unasked.begin(), o.unasked.end());
    return sleep(20) && send_all(ssl, more);
}

bool Upstream::Shared::answer_by_script(const Options& o, SSL* ssl, const Octets& query) {
    const Octets a = o.script(query);
    if (a.empty()) return false;
    Octets framed{uint8_t(a.size() >> 8), uint8_t(a.size())};
    framed.insert(framed.end(), a.begin(), a.end());
    {
        std::lock_guard lock(mutex);
        seen.answers.push_back(a);
    }
    send_all(ssl, framed);
    return true;
}

// ---- Without end -------------------------------------------------------------------------------

static bool is_in_the_clear(Endless what) {
    return what > Endless::Nothing && what <= Endless::DrippedCertificate;
}

// A ServerHello of TLS 1.2 that a client accepts, and the beginning of a Certificate.
static Octets hello_and_certificate() {
    Octets hello{3, 3};
    hello.insert(hello.end(), 32, 0x11);                               // random
    hello = hello + Octets{0, 0xc0, 0x2b, 0, 0, 5, 0xff, 1, 0, 1, 0};  // RFC 5746's extension
    Octets certificate{0, 0x70, 0, 0, 0x6f, 0xfd};                     // 28 kB
    return plain_record(Handshake, handshake_message(2, hello)) +
           plain_record(Handshake, Octets{11} + certificate);
}

// Until the other end has gone, or this one is to stop.
void Upstream::Shared::talk_without_end(Endless what, int pause_ms, SSL* ssl, int fd) {
    size_t poured = 0;
    const auto pour = [&](const Octets& octets) {
        for (size_t at = 0; at < octets.size();) {
            const ssize_t n = send(fd, octets.data() + at, octets.size() - at, MSG_NOSIGNAL);
            if (n <= 0) return false;
            at += size_t(n);
        }
        poured += octets.size();
        std::lock_guard lock(mutex);
        seen.most_endless = std::max(seen.most_endless, poured);
        return !stopping;
    };
    const auto drip = [&](const Octets& octets) {
        for (uint8_t octet : octets)
            if (!pour({octet}) || !sleep(std::max(pause_ms, 10))) return false;
        return true;
    };
    const Octets request = handshake_message(HelloRequest, {});
    const Octets warning{1, 90};  // user_canceled
    std::unique_ptr<Records> records;
    if (!is_in_the_clear(what)) records = std::make_unique<Records>(ssl);
    if (what == Endless::DrippedHello) {  // each octet in a record
        for (uint8_t octet : handshake_message(2, Octets(4000, 3)))
            if (!pour(plain_record(Handshake, {octet})) || !sleep(std::max(pause_ms, 10))) return;
        return;
    }
    if (what == Endless::DrippedRecord) {
        drip(plain_record(Handshake, handshake_message(2, Octets(4000, 3))));
        return;
    }
    if (what == Endless::DrippedCertificate) {
        if (!pour(hello_and_certificate())) return;
        for (int i = 0; i < 28000; i++)
            if (!pour(plain_record(Handshake, {0})) || !sleep(pause_ms)) return;
        return;
    }
    if (what == Endless::DrippedTicket) {
        while (drip(records->ticket())) {
        }
        return;
    }
    const auto one = [&]() -> Octets {
        switch (what) {
            case Endless::HelloRequests:
                return plain_record(Handshake, request);
            case Endless::Warnings:
                return plain_record(Alert, warning);
            case Endless::WarningsAndRequests:
                return plain_record(Alert, warning) + plain_record(Handshake, request);
            case Endless::EmptyRecords:
                return plain_record(Handshake, {});
            case Endless::Tickets:
                return records->ticket();
            case Endless::KeyUpdates:
                return records->update_key(false);
            case Endless::KeyUpdatesWithReply:
                return records->update_key(true);
            case Endless::EmptyData:
                return records->seal(ApplicationData, {});
            case Endless::SealedWarnings:
                return records->seal(Alert, warning);
            default:
                return records->seal(Handshake, request);
        }
    };
    Octets many;
    do {
        if (!is_in_the_clear(what)) many.clear();  // else the same again
        do {
            const Octets more = many.size() < 60000 ? one() : Octets();
            many.insert(many.end(), more.begin(), more.end());
        } while (pause_ms == 0 && many.size() < 60000);
    } while (pour(many) && (pause_ms == 0 || sleep(pause_ms)));
}

// Sends a message with the server's half of the handshake.
static void say_early(SSL* ssl, const Octets& message) {
    uint8_t buffer[100];
    size_t size = 0;
    Octets framed{uint8_t(message.size() >> 8), uint8_t(message.size())};
    framed.insert(framed.end(), message.begin(), message.end());
    while (SSL_read_early_data(ssl, buffer, sizeof buffer, &size) == SSL_READ_EARLY_DATA_SUCCESS) {
    }
    SSL_write_early_data(ssl, framed.data(), framed.size(), &size);
}

// ---- Connections -------------------------------------------------------------------------------

void Upstream::Shared::serve(int fd, int number, const Options& o) {
    const int no_delay = !o.nagle;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &no_delay, sizeof no_delay);
    uint8_t first = 0;
    if (o.accept == Options::Plaintext) {
        const char text[] = "HTTP/1.1 400 Bad Request\r\n\r\n";
        if (recv(fd, &first, 1, MSG_PEEK) == 1) (void)!write(fd, text, sizeof text - 1);
    }
    if (o.accept == Options::Reset) {
        linger now{1, 0};
        setsockopt(fd, SOL_SOCKET, SO_LINGER, &now, sizeof now);
    }
    if (o.accept == Options::Hang) {
        if (recv(fd, &first, 1, MSG_PEEK) == 1) {
            std::lock_guard lock(mutex);
            seen.first_octets.push_back(first);
        }
        while (sleep(50)) {
        }
    }
    if (o.accept == Options::Close) {  // what was not read would make it a reset
        uint8_t hello[4096];
        (void)!recv(fd, hello, sizeof hello, 0);
    }
    if (o.accept == Options::Plaintext || o.accept == Options::Reset ||
        o.accept == Options::Close || o.accept == Options::Hang)
        return;
    if (recv(fd, &first, 1, MSG_PEEK) != 1) return;
    {
        std::lock_guard lock(mutex);
        seen.first_octets.push_back(first);
    }
    if (is_in_the_clear(o.endless)) {
        talk_without_end(o.endless, o.endless_pause_ms, nullptr, fd);
        return;
    }
    SSL* ssl = make_ssl(o);
    SSL_set_fd(ssl, fd);
    if (o.endless != Endless::Nothing) Records::prepare(ssl);
    if (!o.unasked.empty() && o.unasked_when == Options::WithHandshake) say_early(ssl, o.unasked);
    // None at all if none is asked for: it would change how the other end acknowledges.
    if (o.handshake_ms > 0) usleep(1000 * unsigned(o.handshake_ms));
    const int accepted = SSL_accept(ssl);
    // It hangs on the hello, until the client gives up.
    if (SSL_get_error(ssl, accepted) == SSL_ERROR_WANT_CLIENT_HELLO_CB) {
        char octet;
        while (recv(fd, &octet, 1, 0) > 0) {
        }
    }
    if (accepted == 1) {
        {
            std::lock_guard lock(mutex);
            seen.handshakes++;
            seen.resumed += SSL_session_reused(ssl);
        }
        if (o.idle_ms) {
            const timeval limit{o.idle_ms / 1000, o.idle_ms % 1000 * 1000};
            setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
        }
        Octets in;
        size_t record = 0;
        uint8_t buffer[20000];
        int answered = 0;
        bool go_on = o.accept == Options::Serve;
        if (!go_on) SSL_shutdown(ssl);
        if (o.endless != Endless::Nothing && !o.endless_after_query) {
            talk_without_end(o.endless, o.endless_pause_ms, ssl, fd);
            go_on = false;
        }
        while (go_on) {
            errno = 0;
            const int n = SSL_read(ssl, buffer, sizeof buffer);
            if (n <= 0) {
                const bool idle = errno == EAGAIN;
                const bool notified = SSL_get_error(ssl, n) == SSL_ERROR_ZERO_RETURN;
                std::lock_guard lock(mutex);
                if (notified)
                    seen.notified++;
                else if (!idle && !stopping)
                    seen.torn++;
                break;
            }
            if (in.empty()) record = size_t(n);
            in.insert(in.end(), buffer, buffer + n);
            while (go_on && in.size() >= 2 && in.size() >= 2u + u16(in, 0)) {
                const Octets query(in.begin() + 2, in.begin() + 2 + u16(in, 0));
                in.erase(in.begin(), in.begin() + 2 + u16(in, 0));
                {
                    std::lock_guard lock(mutex);
                    seen.queries.push_back(query);
                    seen.records.push_back(record);
                    seen.on.push_back(number);
                }
                go_on = serve_query(ssl, fd, number, query);
                if (go_on && ++answered == o.answers) {
                    SSL_shutdown(ssl);
                    go_on = false;
                }
            }
        }
        if (go_on) SSL_shutdown(ssl);  // idle: said politely
    }
    SSL_free(ssl);
    ERR_clear_error();
}

Upstream::Upstream(const Certificates& certificates, Options options)
    : shared_(std::make_shared<Shared>()) {
    signal(SIGPIPE, SIG_IGN);
    for (auto& l : leaves) {
        shared_->cert_file[int(l.kind)] = certificates.leaf(l.kind);
        shared_->key_file[int(l.kind)] = certificates.key(l.kind);
    }
    shared_->options = options;
    shared_->alpn = options.alpn;
    const bool six = options.address.find(':') != std::string::npos;
    sockaddr_in6 v6{};
    auto& v4 = reinterpret_cast<sockaddr_in&>(v6);
    v6.sin6_family = six ? AF_INET6 : AF_INET;
    inet_pton(v6.sin6_family, options.address.c_str(), six ? (void*)&v6.sin6_addr : &v4.sin_addr);
    v4.sin_port = htons(uint16_t(options.port));
    const int one = 1, fd = socket(v6.sin6_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    socklen_t size = six ? sizeof v6 : sizeof v4;
    for (int tries = 0; bind(fd, (sockaddr*)&v6, size) != 0; tries++) {  // a restart on a port
        if (tries == 100) throw std::runtime_error("upstream: bind");
        usleep(20000);
    }
    listen(fd, 1024);
    getsockname(fd, (sockaddr*)&v6, &size);
    port_ = ntohs(v4.sin_port);
    shared_->listener = fd;
    acceptor_ = std::thread([shared = shared_.get(), fd] {
        for (;;) {
            const int client = accept4(fd, nullptr, nullptr, SOCK_CLOEXEC);
            std::vector<std::thread> done;
            {
                std::lock_guard lock(shared->mutex);
                if (shared->stopping) {
                    if (client >= 0) close(client);
                    return;
                }
                for (int number : shared->ended) {
                    done.push_back(std::move(shared->threads[number]));
                    shared->threads.erase(number);
                }
                shared->ended.clear();
                if (client >= 0) shared->start(client);
            }
            for (auto& thread : done) thread.join();
        }
    });
}

// With the mutex held.
void Upstream::Shared::start(int fd) {
    const int number = ++seen.connections;
    seen.most_open = std::max(seen.most_open, ++seen.open);
    fds.insert(fd);
    Options o = options;
    if (o.most > 0 && served >= o.most) o.accept = Options::Close;
    if (o.reset_each > 0 && number % o.reset_each == 0) o.accept = Options::Reset;
    const bool counts = o.accept == Options::Serve;
    served += counts;
    threads[number] = std::thread([this, fd, number, o, counts] {
        serve(fd, number, o);
        std::lock_guard lock(mutex);
        fds.erase(fd);
        served -= counts;
        seen.open--;
        close(fd);
        ended.push_back(number);
    });
}

Upstream::~Upstream() {
    {
        std::lock_guard lock(shared_->mutex);
        shared_->stopping = true;
        shutdown(shared_->listener, SHUT_RDWR);
        for (int fd : shared_->fds) shutdown(fd, SHUT_RDWR);
        shared_->changed.notify_all();
    }
    acceptor_.join();
    close(shared_->listener);
    for (auto& [number, thread] : shared_->threads) thread.join();
}

static Octets last_with(const std::vector<Octets>& all, int id) {
    for (auto m = all.rbegin(); m != all.rend(); ++m)
        if (m->size() >= 12 && u16(*m, 0) == id) return *m;
    throw std::runtime_error("the upstream saw no message with the id " + std::to_string(id));
}
Octets Seen::query(int id) const { return last_with(queries, id); }
Octets Seen::answer(int id) const { return last_with(answers, id); }

Seen Upstream::seen() const {
    std::lock_guard lock(shared_->mutex);
    return shared_->seen;
}
void Upstream::set(const Options& options) {
    std::lock_guard lock(shared_->mutex);
    shared_->options = options;
}
void Upstream::fall_silent() {
    std::lock_guard lock(shared_->mutex);
    shared_->silent = shared_->seen.connections;
}
std::string Upstream::spec(const std::string& more) const {
    return shared_->now().address + "@" + std::to_string(port_) + "#dot.test" + more;
}

}  // namespace test
